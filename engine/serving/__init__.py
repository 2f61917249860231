"""`engine serve`: indexes over HTTP as collections, for programs (OpenAPI) and for eyes (a page)."""
