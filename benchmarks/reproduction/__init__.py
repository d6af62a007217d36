"""The paper's experiments, simulated: what is run (one file an experiment), what is kept, and the page made of it."""
