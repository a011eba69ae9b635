"""Small experiments on tasks for which attention sinks are necessary."""
