-- most images to look at in the queue
-- -> {{place, priority, images, seconds since the oldest came there} ...}, {name, total ...}, number of dead letters
local most = tonumber(ARGV[2])
local groups, order, about = {}, {}, {}

local function add_image(where, id, since)
  local job = about[id] or redis.call('HMGET', job_key(id), 'priority', 'admitted')
  about[id] = job
  local priority = tonumber(job[1] or 0) or 0
  local name = where .. ' ' .. priority
  if not groups[name] then
    groups[name] = {where, priority, 0, NOW}
    order[#order + 1] = name
  end
  local group = groups[name]
  group[3], group[4] = group[3] + 1, math.min(group[4], since or tonumber(job[2] or NOW) or NOW)
end

local queue = redis.call('ZRANGE', WAITING, 0, most - 1)
for _, ref in ipairs(queue) do add_image('waiting', (split_ref(ref))) end
for _, ref in ipairs(redis.call('SMEMBERS', UNDER_WAY)) do
  local id, index = split_ref(ref)
  local stage, at_ms = string.match(place(id, index) or '', '^(%l+):(%d+)')
  if stage then add_image(stage, id, at_ms / 1000) end
end

-- Of a longer queue the part that was looked at stands for the rest.
local share = #queue > 0 and redis.call('ZCARD', WAITING) / #queue or 1
local found = {}
for i, name in ipairs(order) do
  local where, priority, images, since = unpack(groups[name])
  if where == 'waiting' then images = math.floor(images * share + 0.5) end
  found[i] = {where, priority, images, seconds(math.max(0, NOW - since))}
end

local totals, fields = {}, redis.call('HGETALL', META)
for i = 1, #fields, 2 do
  local name = string.match(fields[i], '^total:(.*)$')
  if name then
    totals[#totals + 1] = name
    totals[#totals + 1] = fields[i + 1]
  end
end
return {found, totals, redis.call('XLEN', DEAD)}
