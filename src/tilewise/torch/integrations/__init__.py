"""Bridges to other libraries, one folder or file each; each imports its library only when it is imported itself."""
