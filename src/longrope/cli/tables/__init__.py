"""What verbs print when they are done: one file for each kind of result."""
