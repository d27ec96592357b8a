"""The command line: one thin module per verb. It parses, calls one function of `pipeline`, and prints."""
