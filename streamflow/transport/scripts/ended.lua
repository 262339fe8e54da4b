-- -> {id, state, seconds that it took ...} of jobs that ended since the last call, each told once
go_on_when_full()
local found = {}
for id, state, took_s in string.gmatch(redis.call('HGET', META, ENDS) or '', '(%S+) (%S+) (%S+)\n') do
  found[#found + 1] = id
  found[#found + 1] = state
  found[#found + 1] = took_s
end
redis.call('HDEL', META, ENDS)
return found
