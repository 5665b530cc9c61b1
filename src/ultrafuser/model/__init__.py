"""The fused model: gate, fusion, cache, loading and saving."""
