"""Tables and figures from results files and traces."""
