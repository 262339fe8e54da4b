"""The state moves of the stream contract, as Lua; `common.lua` goes before each of them."""
