"""Evaluation of a model that a server holds: vLLM, SGLang, llama.cpp and others with OpenAI's completions."""
