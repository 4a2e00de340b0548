"""`threefold bench`: step 3 on models of a given shape with random weights, timed, counted and compared with what the
machine can do."""
