-- stage, worker, then (entry, job, index) for each -> {lost entries, cancelled entries}
local _, stage, worker = unpack(ARGV, 1, 3)
local stream = stream_key(stage, C.revision)
local lost, cancelled = {}, {}
go_on_when_full()
for i = 4, #ARGV, 3 do
  local entry, where = ARGV[i], place(ARGV[i + 1], ARGV[i + 2])
  if where == stage .. ':' .. entry then
    local pending = redis.pcall('XPENDING', stream, GROUP, entry, entry, 1)
    if pending.err or #pending == 0 or pending[1][2] ~= worker then
      lost[#lost + 1] = entry
    else
      redis.call('XCLAIM', stream, GROUP, worker, 0, entry, 'IDLE', 0, 'JUSTID')
    end
  elseif where and not is_live(where) then
    cancelled[#cancelled + 1] = entry
  else
    lost[#lost + 1] = entry
  end
end
return {lost, cancelled}
