"""The command line: one thin module per verb, which parses, calls one function of the library and prints."""
