"""Training: one loop for every method, on Lightning Fabric. A run is a pure function of recipe, pack, seed and step."""
