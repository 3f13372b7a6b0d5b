"""P̂(z_y | ẑ_y) of equation (2): the likelihood of a target given its prediction."""
