"""What both sides of gRPC must agree on: ids, page hashes, the error tree and its mapping to Status, limits."""
