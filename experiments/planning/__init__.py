"""Tables from `monovl plan`: weak scaling, what delta tuning costs."""
