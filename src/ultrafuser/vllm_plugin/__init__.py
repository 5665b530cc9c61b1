"""A fused model in vLLM: `vllm serve MODEL` works once this package is installed beside vLLM (entry point)."""
