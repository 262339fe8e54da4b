-- job, index, from stage, entry, to stage, number of warnings, warnings ..., names and values of the payload ... -> 0 or 1
local _, id, index, from, entry, to, num_warnings = unpack(ARGV)
go_on_when_full()
if place(id, index) ~= from .. ':' .. entry then
  discard(stream_key(from, C.revision), entry)
  return 0
end
local first = 8 + num_warnings
for i = 8, first - 1 do redis.call('HSETNX', job_key(id), 'w:' .. ARGV[i], seconds(NOW)) end
enqueue(id, index, to, {unpack(ARGV, first)})
-- Last, so that no failure above can lose the image.
discard(stream_key(from, C.revision), entry)
wake(id)
return 1
