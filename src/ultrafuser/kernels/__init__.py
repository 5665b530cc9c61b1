"""Products and whole passes by C of our own, compiled by the user's machine; bf16 products in fp32 on any device."""
