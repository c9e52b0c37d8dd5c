"""What the fault tests share: a system whose processes can be stopped at named points, killed and replaced, a proxy
between its routers and Redis, clients that record what they were told, and the record of how long recoveries took."""
