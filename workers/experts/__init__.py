"""Routed experts sharded over a gang: who owns which, and how tokens travel to them and back."""
