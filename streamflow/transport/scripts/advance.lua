-- job, index, from stage, entry, worker or '', to stage, number of warnings, warnings ...,
-- names and values of the payload ... -> 0 or 1
local _, id, index, from, entry, worker, to, num_warnings = unpack(ARGV)
go_on_when_full()
if place(id, index) ~= from .. ':' .. entry then
  discard(stream_key(from, C.revision), entry)
  return made_before(id, index, from, entry, worker)
end
local first = 9 + num_warnings
for i = 9, first - 1 do redis.call('HSETNX', job_key(id), 'w:' .. ARGV[i], seconds(NOW)) end
enqueue(id, index, to, {unpack(ARGV, first)})
-- Last, so that no failure above can lose the image.
discard(stream_key(from, C.revision), entry)
note_move(id, index, from, entry, worker)
wake(id)
return 1
