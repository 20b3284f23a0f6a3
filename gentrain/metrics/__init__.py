"""What generated samples are worth: distances between samples, class accuracy, intervals."""
