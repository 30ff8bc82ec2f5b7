"""One module per stage: a config goes in, objects are built, the work is done, a run folder comes out."""
