"""Stand-ins for other projects' attention, under their own names: a module for each, imported when it is wanted."""
