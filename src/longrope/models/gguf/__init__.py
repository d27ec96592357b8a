"""GGUF, the file format of llama.cpp: its container, the rotary embedding that it states, and the model in it."""
