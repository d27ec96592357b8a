"""Package data: the embedded model, the shipped books, the published factor tables."""
