"""Reports on runs and evaluations: an HTML page or Markdown, with figures, and tables as CSV."""
