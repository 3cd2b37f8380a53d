"""Tool calls: the formats in which models write them, and a parser that finds them in a stream of text."""
