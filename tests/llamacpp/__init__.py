"""An outside truth: llama.cpp on the same GGUF files, which `make test-llamacpp` compares with."""
