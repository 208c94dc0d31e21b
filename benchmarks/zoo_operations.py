def report(*a):
    raise SystemExit("not yet")
