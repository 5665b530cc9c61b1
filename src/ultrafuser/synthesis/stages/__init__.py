"""The stages of a domain, from its topics to its answers."""
