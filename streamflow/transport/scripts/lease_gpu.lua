-- holder, weight, lease_s, then GPUs, the preferred ones first -> the one that the holder has
local _, holder, weight, lease_s = unpack(ARGV, 1, 4)
local load, mine = {}, nil
for i = 5, #ARGV do load[ARGV[i]] = 0 end
go_on_when_full()
local leases = redis.call('HGETALL', GPUS)
for i = 1, #leases, 2 do
  local lapses, taken, gpu = string.match(leases[i + 1], '^(%S+) (%S+) (%S+)$')
  if not lapses or tonumber(lapses) <= NOW then
    redis.call('HDEL', GPUS, leases[i])
  elseif leases[i] == holder then
    mine = gpu
  elseif load[gpu] then
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
redis.call('HSET', GPUS, holder, seconds(NOW + lease_s) .. ' ' .. weight .. ' ' .. mine)
return mine
