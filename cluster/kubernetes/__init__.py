"""What Seamount asks of Kubernetes: is everything there, which nodes and pods are to go, empty this node."""
