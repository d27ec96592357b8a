"""Export to GGUF, the file format of llama.cpp: its keys, its container, and the two ways to write a file."""
