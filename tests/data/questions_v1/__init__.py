"""A small TFDS data set in SQuAD's form; TFDS wants a builder in a package of its own."""
