"""A small TFDS data set in the form of Banking77; TFDS wants a builder in a package of its own."""
