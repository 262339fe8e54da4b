-- holder, weight, lease_s, then GPUs, the preferred ones first -> the one that the holder has
local _, holder, weight, lease_s = unpack(ARGV, 1, 4)
local load, mine = {}, nil
for i = 5, #ARGV do load[ARGV[i]] = 0 end
go_on_when_full()
for _, value in ipairs(redis.call('HVALS', GPUS)) do
  local name, lapses, taken, gpu = string.match(value, '^(%S+) (%S+) (%S+) (%S+)$')
  if name and tonumber(lapses) <= NOW then
    redis.call('HDEL', GPUS, name)
  elseif name == holder then
    mine = gpu
  elseif load[gpu or ''] then
    load[gpu] = load[gpu] + taken
  end
end
-- Nobody moves: what it has is what CUDA was shown.
if not load[mine or ''] then
  mine = ARGV[5]
  for i = 6, #ARGV do
    if load[ARGV[i]] < load[mine] then mine = ARGV[i] end
  end
end
redis.call('HSET', GPUS, holder, holder .. ' ' .. seconds(NOW + lease_s) .. ' ' .. weight .. ' ' .. mine)
return mine
