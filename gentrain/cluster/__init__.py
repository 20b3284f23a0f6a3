"""Where processes run: Ray Train workers, the inline runner, generation fleets. The only package that imports ray."""
