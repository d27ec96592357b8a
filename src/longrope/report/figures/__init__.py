"""The figures of a report, one file a topic. Each function returns a matplotlib Figure and touches no file."""
