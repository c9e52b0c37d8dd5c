"""Moves cache entries between two ranks: frames over pair links, announced by gRPC."""
