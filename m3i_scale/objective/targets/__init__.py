"""What is predicted: the groups k of equation (5), one class a kind."""
