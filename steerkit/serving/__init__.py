"""Serving: exact steering per request on the stock engine of vLLM, and a client for it."""
