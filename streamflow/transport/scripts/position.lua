-- job -> {images that are released before its first waiting one or -1, seconds until it is done or ''} | nothing
local _, id = unpack(ARGV)
local job = redis.call('HMGET', job_key(id), 'images', 'left', 'work')
if not job[1] then return nil end
for index = 0, job[1] - 1 do
  local ahead = redis.call('ZRANK', WAITING, id .. ':' .. index)
  if ahead then
    local expected_s = estimate(work_before(ahead), tonumber(job[3]), tonumber(job[2]))
    return {ahead, expected_s and seconds(expected_s) or ''}
  end
end
return {-1, ''}
