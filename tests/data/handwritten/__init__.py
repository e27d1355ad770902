"""A small TFDS data set; TFDS wants a builder in a package of its own."""
