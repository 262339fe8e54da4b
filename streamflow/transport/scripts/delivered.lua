-- job
local id = ARGV[2]
go_on_when_full()
local job = redis.call('HMGET', job_key(id), 'finished', 'images', 'delivered')
if not job[1] or job[3] then return 0 end
redis.call('HSET', job_key(id), 'delivered', 1)
for index = 0, job[2] - 1 do
  local expires = redis.call('ZSCORE', RESULTS, id .. ':' .. index)
  if expires and tonumber(expires) > NOW + C.delivered_s then keep_result(id, index, C.delivered_s) end
end
return 1
