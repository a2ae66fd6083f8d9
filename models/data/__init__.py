"""Data for the networks: generators, teachers and readers."""
