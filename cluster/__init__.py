"""Ray Serve application, pools, fleet, plain-process cluster, settings, command line."""
