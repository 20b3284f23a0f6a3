"""What an image shows, as a control that a generator can be given: edges, a smaller copy, grey values, depth, segments, its class."""
