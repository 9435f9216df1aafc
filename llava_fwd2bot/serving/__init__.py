"""Serving: the client and the plug-in for vLLM, and the OpenAI-compatible server."""
