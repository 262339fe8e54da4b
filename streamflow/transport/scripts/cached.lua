-- key, keep_s, and the bytes to store where there are none yet -> the value
local _, name, keep_s, data = unpack(ARGV)
local key = C.prefix .. 'cached:' .. name
go_on_when_full()
local value = redis.call('GET', key)
if not value and data then
  redis.call('SET', key, data)
  redis.call('HINCRBY', META, 'cached_bytes', #data)
  value = data
end
if value then redis.call('ZADD', CACHE, 'GT', NOW + keep_s, name) end
if data then
  evict_cached()
  return 0
end
return value
