"""The mesh, one table of sharding rules, and where batches lie on it."""
