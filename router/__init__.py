"""The front door: sessions, history, encoding, parsing, placement, tenants. No torch."""
